"""normcore: the numerical library of normserve. It knows no HTTP."""
