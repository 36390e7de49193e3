"""The selection methods: each is a `Method` at the end of a file here; docs/extending.md shows how to add one."""
