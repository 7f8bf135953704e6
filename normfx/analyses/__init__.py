"""What is known of a value from how it is made: small lattices over the graph, one in each file."""
