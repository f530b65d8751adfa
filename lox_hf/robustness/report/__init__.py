"""A stress test for people: on the screen, as Markdown, as a page."""
