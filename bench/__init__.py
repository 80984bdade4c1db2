"""Cases, timing, references, peers and the results that all published numbers are made from. Not installed."""
