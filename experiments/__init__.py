"""The evidence: what run folders show. Reads run folders on disk and nothing else."""
