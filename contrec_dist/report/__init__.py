"""The stage `evaluate`: metrics.json and a report that opens in a browser."""
