"""How an adapter travels: to files, from files, and between adapters."""
