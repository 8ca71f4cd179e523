"""What the commands print on standard output, made for 80 columns, each also as JSON."""
