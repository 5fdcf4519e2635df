"""What leaves the run: the exported student, its cards, the Hub."""
