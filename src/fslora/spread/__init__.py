"""A simulation's cohorts spread over worker processes, each with a base of its own and a chunk of clients at a time."""
