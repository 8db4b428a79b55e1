"""What a capability costs: minting and verifying chains, beside the raw signature operations in them."""
