"""The processes of one launch (ranks): who they are, how they talk, what ends them."""
