"""How a recipe is read: YAML with line numbers, values against types, impossible combinations. The public face is luthier.recipe."""
