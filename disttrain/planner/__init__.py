"""Which layout is best on so many devices, before one is rented."""
