"""What several examples use: a small pair of models trained on real text, and `lox-hf` commands with their times."""
