"""The method: statistics, design, masked evaluation, regression, cut, recovery; one file a step."""
