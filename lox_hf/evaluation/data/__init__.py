"""What models are asked: prompt sets, questions and texts, by name or from files."""
