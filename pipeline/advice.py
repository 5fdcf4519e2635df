"""The advised figures of a run, for the checks before training and for the checklist."""

BALANCED_SIZES = (3, 10)  # how many times larger than its student a teacher should be
ADVISED_ROWS = (5_000, 50_000)  # the range in which a small student learns a domain
FAIR_START = 150  # rows: what the safe keep rate leaves of 300 prompts; fewer say little about a student
SAFE_KEEP_RATE = 0.5  # of the answers
DISTINCT_SHARE = 0.5  # distinct prompts a row; under it the student reads the same questions over and over
REVIEWED_ROWS = 100  # answers that a person has looked at
