"""How much each unit matters by a cheap statistic: the prior of the masks."""
