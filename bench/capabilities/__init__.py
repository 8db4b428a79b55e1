"""The cost of capability tokens: minting and verifying chains, compared with their raw signature operations."""
