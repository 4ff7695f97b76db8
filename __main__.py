from vivit.cli import main

main()
