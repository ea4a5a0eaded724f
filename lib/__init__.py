"""The rooms behind the scripts: what one trusts. What one reads lies beside this folder."""
