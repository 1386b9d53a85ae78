"""What a run will need, before it is started: memory of a GPU, what is sent, which degrees fit. Knows no torch."""
