"""Linear algebra for all methods: inverses, rankings, scaling, sharding."""
