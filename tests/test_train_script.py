def test_x(smoke): pass
