"""Cases, timing, references, peer libraries, and the results behind all published numbers. Not installed."""
