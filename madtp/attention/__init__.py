"""Multi-head attention that also returns the statistics by which tokens are pruned."""
