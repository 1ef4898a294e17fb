"""What calls cost, and who refuses them.

`cost` has the amounts, `scope` a run's budget and meter, `ledger` the account of all processes; read in that order.
`prices` has the list prices of models behind endpoints.
"""
