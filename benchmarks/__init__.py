"""Programs that measure normserve beside its peers; `make bench` runs them. They print tables and assert nothing."""
