"""Steps 1-3 and 7 of a request: HTTP in, place and reserve, stream back, account."""
