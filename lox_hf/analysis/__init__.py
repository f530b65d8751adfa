"""Why and how much: rank curve, selection, landscape and the view by layers, for any measure of a model."""
