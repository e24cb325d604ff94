"""The tasks: each file holds one task whole, from its data to the drawings of its predictions."""
