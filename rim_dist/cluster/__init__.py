"""Runs on a cluster: the record of every attempt, the supervisor of a rank, submitting jobs, status and logs."""
