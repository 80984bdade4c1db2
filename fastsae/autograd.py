"""The only backward passes."""
