"""How recipes are compared: arms and their names, runs, what the numbers say. The public face is luthier.compare."""
