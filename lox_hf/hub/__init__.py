"""The Hub: what is published with which card, and what a published model says of itself."""
