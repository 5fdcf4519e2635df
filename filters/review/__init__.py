"""Human review: a local page on which a person judges a blind sample of a run, and the agreement of rules and judge
with that person.
"""
