"""What the commands print. The commands themselves are in luthier.cli."""
