"""Word vectors: CBOW and skip-gram (Mikolov et al. 2013) and GloVe (Pennington et al. 2014), trained and judged."""
