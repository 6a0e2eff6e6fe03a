"""The conformance kit: what every architecture plugin must pass, run by `lillama plugin check`."""
