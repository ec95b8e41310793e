"""Who calls, over what connection, and what they may have."""
