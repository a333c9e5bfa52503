"""HTTP: routes, bodies, headers and status codes; the only layer that knows the web framework."""
