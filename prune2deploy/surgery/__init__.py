"""Plan → a new module: slicing, and a captured graph where the model's code holds widths."""
