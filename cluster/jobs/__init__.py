"""Job state in Redis: one state machine, one Lua file per transition, and the store that calls them."""
