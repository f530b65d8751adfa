"""What answers: a model in this process or an endpoint, behind one protocol."""
