"""Where the work runs: threads, processes, devices, and what is on its way between them."""
