"""What the first ten minutes on an accelerator show, as one command and one record."""
