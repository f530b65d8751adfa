"""What the runs of a stress test say."""
