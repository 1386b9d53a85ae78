"""Runs on a cluster: the record of every start, the process around a rank, submitting and looking."""
