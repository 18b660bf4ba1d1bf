"""Workers as others would write them. They share what is no messaging or HTTP (`job`), so that only that differs."""
