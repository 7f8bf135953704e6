"""Facts about the values of a graph that more than one rule asks for; unknown is pessimistic."""
