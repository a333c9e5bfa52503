"""normserve: the HTTP service. A thin shell around normcore."""
