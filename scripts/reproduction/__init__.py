"""The paper's claims, measured; reproduce/ holds the page and the results."""
