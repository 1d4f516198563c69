"""The report: a folder of results as one self-contained HTML page.

`sections` says what each kind of result adds to the page, `gather` reads the folder, `build` writes the page. In the browser
`report.html`, `report.css` and `report.js` show it; nothing is fetched from anywhere.
"""
