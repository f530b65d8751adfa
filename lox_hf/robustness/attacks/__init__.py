"""What an attack trains on and how: recipes, presets, rows of any layout, token ids."""
